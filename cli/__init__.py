"""The command line: click commands, a thin layer over the library. Installed as `logitcache.cli`."""

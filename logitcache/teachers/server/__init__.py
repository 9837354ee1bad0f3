"""A teacher behind an OpenAI-style server: what it is asked, and what is made of its answers."""

from logitcache.teachers.server.options import ServerOptions, is_url
from logitcache.teachers.server.teacher import ServerTeacher

__all__ = ["ServerOptions", "ServerTeacher", "is_url"]

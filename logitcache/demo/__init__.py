"""A real teacher, real text, three students: the main job from nothing, with packages as the only download."""

from logitcache.demo.resources import other_domain_text, plays, teacher_folder
from logitcache.demo.run import DemoResult, DemoView, run_demo

__all__ = ["DemoResult", "DemoView", "other_domain_text", "plays", "run_demo", "teacher_folder"]

"""Teachers: blocks of token ids -> the teacher's logits at every position."""

from logitcache.teachers.transformers_teacher import TransformersTeacher

__all__ = ["TransformersTeacher"]

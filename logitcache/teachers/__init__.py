"""Teachers: blocks of token ids -> sparse rows of the teacher's distribution at every position."""

from logitcache.teachers.server import ServerOptions, ServerTeacher, is_url
from logitcache.teachers.teacher import BlockBatch, Nonfinite, PendingRows, Teacher
from logitcache.teachers.tensor_parallel import TensorParallelTeacher
from logitcache.teachers.transformers_teacher import TransformersTeacher

__all__ = [
    "BlockBatch",
    "Nonfinite",
    "PendingRows",
    "ServerOptions",
    "ServerTeacher",
    "Teacher",
    "TensorParallelTeacher",
    "TransformersTeacher",
    "is_url",
]

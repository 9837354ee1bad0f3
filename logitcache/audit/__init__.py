"""Audits: does a cache hold what a teacher says? Random rows are computed again and compared."""

from logitcache.audit.report import AuditOptions, AuditReport
from logitcache.audit.run import audit_cache
from logitcache.audit.verdict import Figure, Verdict

__all__ = ["AuditOptions", "AuditReport", "Figure", "Verdict", "audit_cache"]

"""What every rule and every backend must do: classes that a new one joins by one line of tests/test_conformance.py."""

from .backend import BackendConformance
from .rule import RuleConformance

__all__ = ["BackendConformance", "RuleConformance"]

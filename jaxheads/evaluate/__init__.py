"""What key/value caches lose: tasks of long contexts, ways to cache by name, and their comparison.

A row is a context of exactly so many tokens and an answer that is scored after it. A policy of
`jaxheads.decode.policies` reads the context; the answer is predicted from what it kept.
"""

from jaxheads.evaluate.contexts import ANSWER, Contexts
from jaxheads.evaluate.measure import Measured, full_bytes, measure
from jaxheads.evaluate.methods import METHODS, CacheMethod, KindOptions, method_scores, policy_of
from jaxheads.evaluate.plan import Plan, Variant
from jaxheads.evaluate.study import Group, Run, Study, run_study
from jaxheads.evaluate.tasks import TASKS, Request, contexts_of

__all__ = [
    "ANSWER",
    "METHODS",
    "TASKS",
    "CacheMethod",
    "Contexts",
    "Group",
    "KindOptions",
    "Measured",
    "Plan",
    "Request",
    "Run",
    "Study",
    "Variant",
    "contexts_of",
    "full_bytes",
    "measure",
    "method_scores",
    "policy_of",
    "run_study",
]

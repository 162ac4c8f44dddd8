"""Circuits: which heads and MLPs carry a behaviour, and by which paths."""

from jaxheads.circuits.cdt import cdt_parts, cdt_relevance, cdt_relevance_to
from jaxheads.circuits.cdt_nodes import Node, head_nodes
from jaxheads.circuits.circuit import Circuit
from jaxheads.circuits.edge_attribution import edge_attribution, edge_effects, node_scores
from jaxheads.circuits.edge_forward import Runner, masked_metric, run_writes
from jaxheads.circuits.faithfulness import faithfulness_curve, random_circuit
from jaxheads.circuits.graph import Graph
from jaxheads.circuits.search import acdc, cdt_search, heads_alone, heads_by_cdt
from jaxheads.circuits.successor import successor_scores
from jaxheads.circuits.token_circuits import (
    copying_scores,
    copying_traces,
    ov_circuit,
    qk_circuit,
)
from jaxheads.circuits.weights import (
    component_composition_scores,
    composition_scores,
    ov_svd,
    qk_svd,
)

__all__ = [
    "Circuit",
    "Graph",
    "Node",
    "Runner",
    "acdc",
    "cdt_parts",
    "cdt_relevance",
    "cdt_relevance_to",
    "cdt_search",
    "component_composition_scores",
    "composition_scores",
    "copying_scores",
    "copying_traces",
    "edge_attribution",
    "edge_effects",
    "faithfulness_curve",
    "head_nodes",
    "heads_alone",
    "heads_by_cdt",
    "masked_metric",
    "node_scores",
    "ov_circuit",
    "ov_svd",
    "qk_circuit",
    "qk_svd",
    "random_circuit",
    "run_writes",
    "successor_scores",
]

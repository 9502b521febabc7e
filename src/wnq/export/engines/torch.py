"""PyTorch's own compiler, with frozen weights."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.decorators import mark_unbacked
from torch._inductor import config, cpp_builder
from torch.utils import _pytree as pytree

from wnq.export.engines.engine import Operator
from wnq.export.program.graph import PRODUCTS, operator_name, weighted_products
from wnq.export.program.tracing import register_operators

INTEGER_PRODUCTS = ("qconv", "qlinear", "_int_mm")
"""Beginnings of the names of integer products of a compiled graph."""

EXAMPLES = 2


class Torch:
    """A program of ``torch.export``, compiled by inductor with frozen weights, on one thread of the CPU.

    Without a C++ compiler, or where the compiler fails, it runs eagerly, in floating point on the same grids; ``settings`` say so.

    Args:
        path: a ``.pt2`` file.
        accuracy_level: not used; programs have no packed weights with float inputs.
    """

    def __init__(self, path: Path, *, accuracy_level: int = 0) -> None:
        register_operators()
        torch.set_num_threads(1)
        self.version = f"torch {torch.__version__}"
        with path.open("rb") as file:
            program: Any = torch.export.load(file)
        self._layers = [(layer, operator_name(node)) for layer, node in weighted_products(program)]
        self._program = program.module()
        self._kinds: list[str] | None = None
        self._run: Any = self._program
        self.settings: dict[str, str] = {"torch._inductor.config.freezing": "True", "torch.compile": "dynamic=True"}
        why = _no_compiler() or self._compile(_examples(program))
        if why:
            self._run, self._kinds = self._program, None
            self.settings = {"torch.compile": f"not used, so it ran eagerly in floating point: {why}"}

    def _compile(self, inputs: list[Any]) -> str:
        """Compile, and return why that failed; empty if it did not."""
        why = ""
        # A batch of unknown size serves batch 1 too, which would else be compiled again; not every network compiles so.
        for unknown in (True, False):
            self._kinds = None
            if unknown:
                for x in inputs:
                    mark_unbacked(x, 0)
            self._run = torch.compile(self._program, dynamic=None if unknown else True)
            try:
                self.run([x.numpy() for x in inputs] if not unknown else inputs)
                return ""
            except Exception as error:
                why = _first_line(error)
        return why

    def run(self, inputs: Sequence[Any]) -> Any:
        """Return the first output."""
        tensors = [x if isinstance(x, torch.Tensor) else torch.from_numpy(x) for x in inputs]
        settings = {"freezing": True, "post_grad_custom_pre_pass": self._keep}
        with torch.no_grad(), config.patch(settings), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pytree.tree_leaves(self._run(*tensors))[0].numpy()

    def _keep(self, graph: Any) -> None:
        """Note the products of a compiled graph, all but those of two computed values.

        It is the graph of the examples; what torch may compile for a batch of one is another.
        """
        if self._kinds is None:
            self._kinds = [operator_name(node) for node in graph.nodes if _is_product(node)]

    def operators(self) -> list[Operator]:
        """Return the products of the compiled graph; of the program, where it is not compiled."""
        kinds = self._kinds
        if kinds is None:
            return [Operator(layer, kind, False) for layer, kind in self._layers]
        # The compiler keeps the order of products, and no names.
        names = [layer for layer, _ in self._layers] if len(kinds) == len(self._layers) else [""] * len(kinds)
        return [
            Operator(name, kind, kind.startswith(INTEGER_PRODUCTS)) for name, kind in zip(names, kinds, strict=True)
        ]


def _no_compiler() -> str:
    """Return why there is no C++ compiler; empty if there is one."""
    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _is_product(node: Any) -> bool:
    """Whether a node of a compiled graph is a product with stored weights."""
    name = operator_name(node).lstrip("_").removeprefix("mkl_")
    return (
        name.startswith((*PRODUCTS, *INTEGER_PRODUCTS))
        and "prepack" not in name
        and any(argument.op == "get_attr" for argument in node.all_input_nodes)
    )


def _examples(program: Any) -> list[Any]:
    """Return zeros that fit a program's inputs, a batch of :data:`EXAMPLES`."""
    names = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph_module.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [[s if isinstance(s, int) else EXAMPLES for s in node.meta["val"].shape] for node in nodes]
    return [torch.zeros(shape, dtype=node.meta["val"].dtype) for shape, node in zip(shapes, nodes, strict=True)]

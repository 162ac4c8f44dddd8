"""The demonstration that `make demo` runs."""

from jaxheads.demo.run import run_demo

__all__ = ["run_demo"]

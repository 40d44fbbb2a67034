"""From a network to a multi-headed one: trace, split, solve sizes, plan, build."""

from ensemblenet.conversion.convert import convert, plans, rebuild, split_points

__all__ = ["convert", "plans", "rebuild", "split_points"]

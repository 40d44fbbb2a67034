"""From a network to a multi-headed one: trace, split, solve sizes, plan, build."""

from ensemblenet.conversion.convert import convert, convert_as, plans, rebuild, split_points

__all__ = ["convert", "convert_as", "plans", "rebuild", "split_points"]

"""From a base network to a trunk and narrowed heads: trace, split, narrow, budget."""

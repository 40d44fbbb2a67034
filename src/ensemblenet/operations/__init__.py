"""All that is known of an operation: how its sizes couple, and how it is narrowed."""

"""From noise to data: solvers of the flow's equation."""

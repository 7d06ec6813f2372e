"""Several runs side by side: a grid, its processes, its table; and the demo."""

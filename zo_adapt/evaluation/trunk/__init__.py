"""The layers below the view, run once for each example."""

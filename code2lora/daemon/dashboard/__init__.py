"""What the worker shows in a browser: pages without a framework, and the data that they draw."""

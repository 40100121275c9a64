"""What is measured: operations, shapes with their FLOPs and bytes, and suites."""

"""What is measured and checked: operations, shapes with their FLOPs and bytes, and suites."""

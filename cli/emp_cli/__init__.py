"""The command line of emp-llm."""

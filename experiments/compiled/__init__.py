"""What a compiled step costs and contains."""

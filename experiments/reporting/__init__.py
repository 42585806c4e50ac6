"""From result folders to tables and figures."""

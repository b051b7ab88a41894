"""Where a session plugs into frameworks for voice agents. Each module needs an extra of its own."""

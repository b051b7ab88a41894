"""LiveAct engine."""

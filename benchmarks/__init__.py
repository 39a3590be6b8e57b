"""What the launchers cost and give, measured."""

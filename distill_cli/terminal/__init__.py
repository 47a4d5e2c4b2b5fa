"""What the user sees while a command runs: a console, one line a step, a live panel."""

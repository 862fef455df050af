"""What people see, through rich. No logic."""

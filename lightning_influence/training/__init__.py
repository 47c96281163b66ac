"""What happens inside a Lightning run: which rows are trained on, and when."""

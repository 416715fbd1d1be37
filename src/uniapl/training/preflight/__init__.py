"""What is loaded and checked before the first step."""

"""What engines are held against."""

"""What demo.py and the scripts in tools/ run."""

"""kvjax."""

"""File containers that adapters and base weights share: headers walked into leaves, no maths."""

"""Base weights: headers, lazy reading, the streaming writer; every call that is not portable."""

"""How adapters and bases name modules: PEFT's patterns, and the vocabularies between them."""

"""What was learned when: tokens, heads, layers, from what is stored of each step."""

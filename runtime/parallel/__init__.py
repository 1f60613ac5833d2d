"""One request on several GPUs: which ranks do what (`layout`), how they reach each other (`mesh`, `group`), and what is
split among them (`usp`: tokens, `tensor`: weights, `decode`: pictures).
"""

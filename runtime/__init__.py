"""Request -> pictures: load, place, denoise, decode, account. Read `engine.py` first."""

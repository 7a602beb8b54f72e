"""postgrad: supervised fine-tuning that proves its path and every number.

Layers, higher may import lower, siblings joined by | may not import each other:
cli > stages > demo > report > evaluate > train > data | model > scoring > run > config > types
"""

__version__ = "0.1.0"

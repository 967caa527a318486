"""The proof kit: is this checkpoint, this resume, this layout, this version what one thinks it is?

`dsv3 prove …` ends in one word (proved, refuted, incomplete) and writes a folder that a bug report can hold: what was
compared, how exactly, what was not covered; no weights, no paths, no names of machines. See docs/prove.md.
"""

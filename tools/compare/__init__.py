"""Compares configs at equal training time: see ``python -m tools.compare --help``.

configs     what a config becomes for a cell: its length, seed, rate and identity
cells       finished cells, kept in a folder, and the one way to get another
measure     trains a cell and reads what it cost and scored
comparison  which cells a comparison needs, in which order
statistics  curves of score against cost, and the time to a score
search      successive halving over config keys
table       all of it in Markdown
plot        and as a picture
"""

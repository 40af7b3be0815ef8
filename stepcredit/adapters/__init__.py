"""The credit of this package inside other trainers.

`rows` is the plain function behind all of them: padded rows in, advantages for every token out. It needs torch alone.
"""

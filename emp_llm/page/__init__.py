"""A report as one page for a browser, as figures for a paper and as the figure of a model card.

report → content (every number and word that is shown) → page: HTML, style, script in one file
       → figures: drawn by matplotlib
       → card_figure: an SVG that needs nothing but text
"""

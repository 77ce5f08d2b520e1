"""A report as one page for a browser, self-contained, and as figures for a paper.

    report → content (every number and word that is shown) → page: HTML, style and script in one file
                                                           → figures: matplotlib
                                                           → card_figure: the SVG of model cards
"""

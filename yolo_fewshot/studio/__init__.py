"""Studio: a page on the user's own machine to label a few objects and see the detector learn them."""

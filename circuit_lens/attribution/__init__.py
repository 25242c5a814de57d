"""Attribution graphs by linearised Jacobians: the frozen linear model of one prompt and its rows."""

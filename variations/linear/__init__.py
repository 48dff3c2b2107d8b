"""Linear maps; heads too."""

from variations.linear.pkl import PKLLinear
from variations.linear.quantised import QuantisedLinear
from variations.linear.standard import Linear

LINEARS: dict[str, type] = {"standard": Linear, "pkl": PKLLinear, "quantised": QuantisedLinear}

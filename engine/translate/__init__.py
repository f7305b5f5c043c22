"""Virtual address translation (vtop): paging modes as data, one scalar walk, one vectorised walk, views and queries."""

-- rows: sides
SELECT * FROM pair_sides

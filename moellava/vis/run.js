// What the page of `moellava report` draws of its data; see `page_data` in run_page.py.
const charts = document.getElementById('charts');
for (const chart of data.charts)
  lines(add(charts, 'div'), {x: chart.x, series: chart.series, title: chart.title, across: 'step', zero: chart.zero, width: 350,
                             height: 190});
if (data.loads) {
  const R = data.loads, slider = document.getElementById('layer');
  const top = Math.max(2, ...R.unevenness.flat());
  let layer = 0;
  const pick = k => { layer = k; slider.value = k; draw(); };
  const draw = () => {
    document.getElementById('name').textContent = 'layer ' + R.layers[layer];
    heat(document.getElementById('layers'), {rows: R.layers, columns: R.steps, values: R.unevenness, vmax: top, width: 1100,
      title: 'largest load of each layer', across: 'step', down: 'layer', marked: layer, pick, unit: ' × the even share',
      tip: (r, c) => `layer ${R.layers[r]}, step ${R.steps[c]}\nlargest load ${number(R.unevenness[r][c])} × the even share\n` +
        `${R.dead[r][c]} dead experts`});
    const table = R.of_layer[layer];
    heat(document.getElementById('experts'), {rows: table.map((_, e) => e), columns: R.steps, values: table, vmax: top, width: 1100,
      title: `experts of layer ${R.layers[layer]}`, across: 'step', down: 'expert', unit: ' × the even share',
      tip: (r, c) => `expert ${r}, step ${R.steps[c]}\n${number(100 * table[r][c] / table.length)} % of the choices, ` +
        `${number(table[r][c])} × the even share`});
  };
  slider.max = R.layers.length - 1; slider.value = 0;
  slider.addEventListener('input', () => pick(+slider.value));
  draw();
}

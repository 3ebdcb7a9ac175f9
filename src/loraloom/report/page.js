"use strict";
(() => {
  const { panels, look: LOOK } = JSON.parse(document.getElementById("data").textContent);
  const LIGHT = LOOK.light, DARK = LOOK.dark; // marker, dash and hatch say the same as colour
  const DASHES = LOOK.dashes, SYMBOLS = LOOK.symbols, HATCHES = LOOK.hatches;
  const MARKED = LOOK.marked; // a line of more points than this shows no markers
  const ROW = 30; // of a legend, px
  const PAPER = { width: 640, height: 320 }; // of a plot on paper, px

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)"); // a finger that moves over a plot scrolls the page
  const cut = (name) => { const at = name.indexOf(", "); return at < 0 ? [name, ""] : [name.slice(0, at), name.slice(at + 2)]; };
  const once = (list) => [...new Set(list)];
  // Plotly reads a little HTML in its texts; these are data and stay as they are.
  const plain = (value) => String(value).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const short = (value) => String(Number(value.toPrecision(4)));
  const all = panels.flatMap((panel) => panel.series || []).map((series) => cut(series.name));
  const groups = once(all.map(([group]) => group));
  const variants = once(all.map(([, variant]) => variant));

  const look = (panel, index, theme) => {
    const [group, variant] = cut(panel.series[index].name);
    const g = groups.indexOf(group);
    const inside = once(panel.series.map((series) => cut(series.name)[1]));
    const turn = Math.floor(g / theme.hues.length); // the next marker when the colours are through
    return { hue: theme.hues[g % theme.hues.length], symbol: SYMBOLS[(g + turn) % SYMBOLS.length],
      variant: inside.indexOf(variant), open: inside.indexOf(variant) % 2 === 1, g };
  };
  const channels = (hue) => [1, 3, 5].map((at) => parseInt(hue.slice(at, at + 2), 16));
  const fade = (hue, alpha) => `rgba(${channels(hue).join()},${alpha})`;
  const interval = (series) => series.y.map((y, i) => series.low ? ` [${short(series.low[i])}, ${short(series.high[i])}]` : "");

  const curve = (panel, theme) => {
    const bands = [], lines = [];
    panel.series.forEach((series, index) => {
      const style = look(panel, index, theme);
      const x = series.x.map((value) => typeof value === "string" ? plain(value) : value);
      const marked = x.length <= MARKED;
      if (series.low) {
        bands.push({ type: "scatter", mode: "lines", x: [...x, ...x.slice().reverse()],
          y: [...series.high, ...series.low.slice().reverse()], fill: "toself", fillcolor: fade(style.hue, 0.14),
          line: { width: 0, color: style.hue }, hoverinfo: "skip", showlegend: false, legendgroup: series.name });
      }
      lines.push({ type: "scatter", mode: marked ? "lines+markers" : "lines", x, y: series.y, name: plain(panel.short.series[index]),
        legendgroup: series.name, customdata: interval(series), hovertemplate: "%{y:.4~g}%{customdata}",
        line: { color: style.hue, width: 2.25, dash: DASHES[(marked ? style.variant : index) % DASHES.length] },
        marker: { symbol: style.symbol + (style.open ? "-open" : ""), size: 8, color: style.hue,
          line: { width: style.open ? 2 : 1, color: style.open ? style.hue : theme.paper } } });
    });
    const values = panel.series.flatMap((series) => [...series.y, ...(series.low || []), ...(series.high || [])]);
    const low = Math.min(...values), high = Math.max(...values), digits = decimals(low, high);
    return { data: [...bands, ...lines], layout: { hovermode: "x unified",
      xaxis: { title: { text: plain(panel.x_label) } }, yaxis: { title: { text: plain(panel.y_label) },
        ...(digits && digits < 5 ? { tickformat: `.${digits}f` } : {}),
        ...(low === high ? { range: low ? [low - 0.1 * Math.abs(low), low + 0.1 * Math.abs(low)] : [-1, 1] } : {}) } } };
  };

  // Ticks of named places; of more than fit some are left out.
  const kept = (names, wide) => (_, at) => at % Math.ceil(names.length / (wide < 480 ? 16 : 40)) === 0;
  const ticks = (names, wide = 1000) => ({ tickmode: "array", tickvals: names.map((_, at) => at).filter(kept(names, wide)),
    ticktext: names.map(plain).filter(kept(names, wide)) });

  const bars = (panel, theme, wide) => ({
    data: panel.series.map((series, index) => {
      const style = look(panel, index, theme);
      const above = series.low && series.high.map((high, i) => high - series.y[i]);
      const below = series.low && series.low.map((low, i) => series.y[i] - low);
      return { type: "bar", x: series.x.map(plain), y: series.y, name: plain(panel.short.series[index]), customdata: interval(series),
        hovertemplate: "%{y:.4~g}%{customdata}",
        marker: { color: style.hue, line: { color: style.hue, width: 1 },
          pattern: { shape: HATCHES[index % HATCHES.length], fillmode: "replace", fgcolor: style.hue,
            bgcolor: fade(style.hue, 0.18), size: 7, solidity: 0.35 } },
        error_y: above ? { type: "data", array: above, arrayminus: below, symmetric: false, color: theme.ink,
          thickness: 1.5, width: 4 } : undefined };
    }),
    layout: { barmode: "group", bargap: 0.28, bargroupgap: 0.08, hovermode: "x unified",
      xaxis: { type: "category", categoryorder: "array", categoryarray: panel.categories.map(plain),
        ...ticks(panel.short.x, wide), tickvals: panel.categories.map(plain).filter(kept(panel.categories, wide)),
        ...(Math.max(...panel.short.x.map((x) => x.length)) * panel.categories.length > wide / 8 ? { tickangle: -60 } : {}) },
      yaxis: { title: { text: plain(panel.y_label) }, rangemode: "tozero" } },
  });

  // Colour at a share of a scale, and the darker or lighter of two inks on it, by WCAG's contrast.
  const mixed = (scale, share) => {
    const at = Math.max(...scale.slice(0, -1).map(([place], i) => place <= share ? i : 0));
    const [[low, one], [high, other]] = scale.slice(at, at + 2), part = (share - low) / (high - low);
    return channels(one).map((value, i) => value + (channels(other)[i] - value) * part);
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const inkOn = (rgb) => light(rgb) > 0.18 ? "#000000" : "#ffffff";
  // Decimals that tell the ticks of an axis from low to high apart; Plotly draws fewer than ten.
  const decimals = (low, high) => {
    const rough = (high - low) / 10, size = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * size >= rough * 0.999) * size;
    return Number.isFinite(step) ? Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) : 0;
  };
  const cells = (panel, scale, low, high) => {
    const most = Math.max(Math.abs(low), Math.abs(high));
    const digits = most > 0 && most < 1e5 && most >= 1e-3 ? Math.max(0, 2 - Math.floor(Math.log10(most))) : null;
    return panel.z.flatMap((row, y) => row.map((value, x) => value === null ? null : { x, y, showarrow: false,
      text: digits === null ? value.toPrecision(3) : value.toFixed(digits),
      font: { size: 12, color: inkOn(mixed(scale, high > low ? (value - low) / (high - low) : 0.5)) } }).filter(Boolean));
  };
  const heatmap = (panel, theme, wide) => {
    const known = panel.z.flat().filter((value) => value !== null);
    const low = Math.min(...known), high = Math.max(...known), most = Math.max(-low, high);
    const both = low < 0 && high > 0; // then 0 is in the middle of the colours
    const scale = both ? theme.diverging : theme.scale, [from, to] = both ? [-most, most] : [low, high];
    const longest = (names) => Math.max(...names.map((name) => name.length));
    const room = (wide - 90 - 7 * longest(panel.short.y)) / panel.x.length; // of a cell, px
    const few = room >= 36 && panel.y.length <= 24 && panel.x.length * panel.y.length <= 250;
    const nothing = { text: "no values", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
    return {
      rows: panel.y.length,
      data: [{ type: "heatmap", z: panel.z, colorscale: scale, showscale: known.length > 0 && high > low,
        ...(known.length ? { zmin: from, zmax: to > from ? to : from + 1 } : {}),
        customdata: panel.y.map((y) => panel.x.map((x) => `${plain(y)}, ${plain(x)}`)),
        xgap: 1, ygap: 1, hoverongaps: false, hovertemplate: "%{customdata}: %{z:.4~g}<extra></extra>",
        colorbar: { thickness: 12, outlinewidth: 0, tickfont: { color: theme.muted }, len: 1, nticks: 6,
          title: { text: plain(panel.z_label || ""), side: "right", font: { size: 13 } } } }],
      layout: { annotations: !known.length ? [nothing] : few ? cells(panel, scale, from, to) : [],
        xaxis: { ...ticks(panel.short.x), title: { text: plain(panel.x_label) }, showgrid: false,
          ...(longest(panel.short.x) * 7.5 > room ? { tickangle: room < 18 ? -90 : -45 } : {}) },
        yaxis: { ...ticks(panel.short.y), title: { text: plain(panel.y_label) }, showgrid: false, autorange: "reversed" } },
    };
  };

  const KINDS = { curve, bars, heatmap };
  const merged = (axis, own) => ({ ...axis, ...own, title: { ...(own.title || {}), standoff: 8, font: { size: 13 } } });
  const draw = (theme, size = {}) => panels.forEach((panel, index) => {
    const place = document.getElementById(`plot-${index}`);
    if (!place) return;
    const { data, layout, rows: lines } = KINDS[panel.kind](panel, theme, size.width || place.clientWidth);
    const rows = legendRows(panel, (size.width || place.clientWidth) - 30);
    const tall = lines ? Math.max(200, 110 + lines * (lines > 24 ? 15 : 24)) : 0; // a heat map has rows of one height
    if (!size.height) place.style.height = tall ? `${tall}px` : rows > 1 ? `calc(var(--plot) + ${(rows - 1) * ROW}px)` : "";
    const axis = { color: theme.ink, gridcolor: theme.grid, linecolor: theme.line, tickcolor: theme.line, ticks: "outside",
      ticklen: 4, exponentformat: "e", showline: true, zeroline: false, automargin: true,
      fixedrange: touch.matches, tickfont: { size: 12, color: theme.muted } };
    Plotly.react(place, data, { ...layout, xaxis: merged({ ...axis, showgrid: false }, layout.xaxis),
      yaxis: merged(axis, layout.yaxis), ...size, ...(size.height && tall ? { height: Math.max(240, 80 + lines * 18) } : {}), autosize: !size.width, paper_bgcolor: theme.paper, plot_bgcolor: theme.paper,
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif", size: 13, color: theme.ink },
      margin: { l: 12, r: 12, t: 12, b: 12 }, showlegend: (panel.series || []).length > 1,
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 13 }, maxheight: rows * ROW + 14 },
      hoverlabel: { bgcolor: theme.paper, bordercolor: theme.line, font: { color: theme.ink } },
      dragmode: touch.matches ? false : "zoom",
    }, { responsive: true, displayModeBar: false });
  });
  // Plotly gives every entry of a legend the width of the widest.
  function legendRows(panel, wide) {
    const names = (panel.short && panel.short.series) || [];
    const each = 62 + 7.2 * Math.max(0, ...names.map((name) => name.length));
    return Math.ceil(names.length / Math.max(1, Math.floor(wide / each)));
  }
  const drawScreen = () => draw(dark.matches ? DARK : LIGHT);
  drawScreen();
  dark.addEventListener("change", drawScreen);
  window.addEventListener("beforeprint", () => draw(LIGHT, PAPER));
  window.addEventListener("afterprint", drawScreen);

  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const key = (row) => row.cells[column].dataset.value;
      const numeric = head.classList.contains("number");
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [left, right] = [key(a), key(b)];
        if (left === undefined || right === undefined) return (left === undefined) - (right === undefined); // empty cells last
        return sign * (numeric ? Number(left) - Number(right) : left.localeCompare(right, "en", { numeric: true }));
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    }));
  });

  document.querySelectorAll("button[data-format]").forEach((button) => button.addEventListener("click", () => {
    const place = document.getElementById(`plot-${button.dataset.plot}`);
    const { width, height } = place.getBoundingClientRect();
    const format = button.dataset.format;
    Plotly.downloadImage(place, { format, width, height, scale: format === "png" ? 3 : 1, filename: button.dataset.name });
  }));

  document.querySelectorAll(".command button").forEach((button) => button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      window.getSelection().selectAllChildren(text); // no clipboard here: the reader presses the keys
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }));
})();

// Shows graphs in the editor's App mode, for test_app_mode.py: a job has "graphs": [{"name", "file", "run"}] (page.cjs says what else),
// where `run` is {"changes": {node type: {widget: value}}, "typed", "outputs"}. What is asked for goes to standard output as JSON. One to
// run gets what is typed into its first text field and a click on its button; as many pictures as it has outputs come.
'use strict'

const { readFileSync } = require('node:fs')

const { change, drawn, main } = require('./page.cjs')

const SHOW = 15_000
const RUN = 180_000
const id = (name) => `[data-testid="${name}"]`

async function run(page, { typed, outputs }) {
  await page.locator(`${id('linear-widgets')} textarea`).first().fill(typed)
  await page.click(id('linear-run-button-icon'))
  const results = await page.waitForFunction(
    ([selector, outputs]) => {
      const images = [...document.querySelectorAll(selector)]
      const there = images.length === outputs && images.every((image) => image.complete && image.naturalWidth)
      return there && images.map((image) => image.src)
    },
    [`img${id('linear-image-output')}, ${id('linear-image-output')} img`, outputs],
    { timeout: RUN }
  )
  return results.jsonValue()
}

main(async (page, job, report) => {
  report.graphs = {}
  for (const graph of job.graphs) {
    await page.evaluate((shown) => window.app.loadGraphData(shown), JSON.parse(readFileSync(graph.file, 'utf8')))
    if (graph.run) await change(page, graph.run.changes)
    await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.ToggleLinear'))
    const widgets = page.locator(id('linear-widgets'))
    await widgets.waitFor({ timeout: SHOW })
    await drawn(page)
    const found = { asked: await widgets.innerText() }
    if (graph.run) found.results = await run(page, graph.run)
    await page.screenshot({ path: `${job.pictures}/app-${graph.name}-${job.nodes2 ? 'nodes2' : 'classic'}.png` })
    await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.ToggleLinear'))
    report.graphs[graph.name] = found
  }
})

// Makes the nodes with a view in chromium, in the editor's language, for test_language.py (page.cjs says how).
// What is seen goes to standard output as JSON; whether that is right is for the tests to say.
'use strict'

const { drawn, main } = require('./page.cjs')

function build(types) {
  for (const [index, type] of types.entries()) {
    const node = window.LiteGraph.createNode(type)
    node.pos = [100 + 500 * index, 150]
    window.app.graph.add(node)
  }
}

/** All that a view of this class says, by sight or by its elements' attributes. */
function said(name) {
  const root = document.querySelector(`.truefill-${name}`)
  const elements = [root, ...root.querySelectorAll('*')]
  const attributes = elements.flatMap((element) => [element.title, element.alt, element.getAttribute('aria-label')])
  const texts = elements.filter((element) => !element.children.length).map((element) => element.textContent)
  return [...new Set([...texts, ...attributes])].filter((text) => /\p{L}/u.test(text ?? ''))
}

main(async (page, job, report) => {
  await page.evaluate(build, ['TrueFillPoints', 'TrueFillCompare'])
  await page.waitForSelector('.truefill-compare')
  await drawn(page)
  for (const name of ['points', 'compare']) report[name] = await page.evaluate(said, name)
  await page.screenshot({ path: `${job.pictures}/language-${job.language}.png` })
})

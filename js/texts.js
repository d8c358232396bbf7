// The views' texts, from texts/<language>.json.
import { app } from '../../scripts/app.js'

const ENGLISH = 'en'
const LANGUAGES = [ENGLISH, 'de', 'es', 'fr', 'ja', 'ko', 'pt-BR', 'ru', 'zh', 'zh-TW']

let texts = {}
let reading

/** The text of this name in the editor's language, in English where there is none in that. */
export function text(name) {
  return texts[name] ?? name
}

/** An extension's `init`, which the editor waits for before it makes a node. */
export function readTexts() {
  reading ??= read(app.ui.settings.getSettingValue('Comfy.Locale'))
  return reading
}

async function read(language) {
  const wanted = LANGUAGES.filter((known) => known === ENGLISH || known === language)
  const found = await Promise.all(wanted.map(load))
  texts = Object.assign({}, ...found)
}

async function load(language) {
  const answer = await fetch(new URL(`./texts/${language}.json`, import.meta.url))
  return answer.ok ? answer.json() : {}
}
